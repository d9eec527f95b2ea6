"""The parts models are made of: linear, norm, rotary, MLP, embedding."""
