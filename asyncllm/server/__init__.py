"""HTTP, on the event loop: routes, wire structs, validation, Server-Sent Events, probes, the life of the process."""
