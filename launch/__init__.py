"""Starts runs elsewhere.  Empty until the SLURM launcher lands; it will read lpl_pretrain.config and import no torch."""
