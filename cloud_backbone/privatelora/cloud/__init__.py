"""The service's half: the frozen model, its adapter sets, and the data plane that devices compute over."""
