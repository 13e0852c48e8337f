"""`trunkline dev`: NATS, one process of each role and a reloader, which live and die together."""
