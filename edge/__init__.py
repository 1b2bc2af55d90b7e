"""From a model directory to a generating device: build, run, push, agent."""
