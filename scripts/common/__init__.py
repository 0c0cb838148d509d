"""What benchmarks and studies share. They put `scripts/` on the path and import from here."""
