"""Trainers of other packages on fastdpop. They choose losses and pass batches on; no mathematics is here."""
