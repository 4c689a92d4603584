"""One model over several devices: every rank runs the same plans on its part of the weights."""
