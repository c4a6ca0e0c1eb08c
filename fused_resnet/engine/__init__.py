"""The whole network as one program: planned from its graph, tuned on the machine it runs on, captured."""
