"""The whole network: its roofline; model -> steps, candidates verified then timed, buffers and graph."""
