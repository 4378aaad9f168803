"""What an operator may ask of a device, and its owner may allow: one file a kind, with `KIND` and `run`.

A file is imported by the control plane as well, which reads `KIND` and never runs anything; so torch is imported within
`run`.
"""
