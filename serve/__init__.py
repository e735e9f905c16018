"""The chat page and the API: models that answer on this machine alone."""
