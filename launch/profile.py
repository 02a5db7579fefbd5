"""The cluster profile, which lpl_pretrain/config/cluster.py defines beside the other sections."""

from lpl_pretrain.config.cluster import ClusterProfile

__all__ = ["ClusterProfile"]
