"""What device and service agree on: errors, placements, adapter specs, frames, messages and their cost. No torch."""
