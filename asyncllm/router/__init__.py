"""Floor 4: text in, text out, on the event loop."""
