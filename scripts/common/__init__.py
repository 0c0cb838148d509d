"""Code shared by benchmarks and studies, which put `scripts/` on the path to import it."""
