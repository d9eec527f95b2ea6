"""Attention backends: store a step's keys and values in the pages, then attend to them."""
