"""Multi-exit models under other libraries' trainers; each module needs its library, and is imported by its own name."""
