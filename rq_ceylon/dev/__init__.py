"""What serves development: the embedded server, and `ceylon demo`, `ceylon server` and `ceylon up`."""
