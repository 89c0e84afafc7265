"""Worlds in the formats of the field, to be read by its own tools."""

from paperworks.worlds.export.coco import write_coco
from paperworks.worlds.export.nerf import write_nerf
from paperworks.worlds.export.nuscenes import write_nuscenes

__all__ = ["write_coco", "write_nerf", "write_nuscenes"]
