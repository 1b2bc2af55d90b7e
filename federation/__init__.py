"""The Flower server side, and the vocabulary that every site shares: adapter, wire format, events, lineage."""
