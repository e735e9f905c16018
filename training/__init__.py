"""The loop and what keeps it alive: settings, optimizer, schedule, resume, distribution, metrics."""
