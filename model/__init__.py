"""The network and all that is done to it. No I/O, no prints, no global state."""
