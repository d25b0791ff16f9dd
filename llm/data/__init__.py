"""From sources to rows: where raw data comes from, how it is read, split, rendered and packed."""
