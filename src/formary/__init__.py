"""Formary: own a Transformer from raw data to a served model, on the machine you already have."""
