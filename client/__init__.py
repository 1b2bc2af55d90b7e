"""One private site: its data, its model, its training loop."""
