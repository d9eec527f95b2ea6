"""The load generator and the comparison bench: clients of the server, never part of it."""
