"""The Flower server side, and what every site shares: adapter, wire format, events, lineage."""
