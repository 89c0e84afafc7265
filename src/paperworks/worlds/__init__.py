"""One procedural 3-D world and every sensor over it."""

from paperworks.worlds.camera import Views, mask_boxes, render
from paperworks.worlds.export import write_coco, write_nerf, write_nuscenes
from paperworks.worlds.flat import FLAT_SHAPES, FlatScenes, flat_scenes
from paperworks.worlds.language import Expression, Statement, execute, refer, state
from paperworks.worlds.lidar import Lidar, PointCloud, scan
from paperworks.worlds.make import DOMAINS, Recipe, Surroundings, make_scene, make_scenes, orbit, rig
from paperworks.worlds.motion import ACTIONS, Clip, animate
from paperworks.worlds.scene import COLOURS, Camera, Light, Scene, Thing, corners
from paperworks.worlds.solids import SHAPES

__all__ = [
    "ACTIONS",
    "COLOURS",
    "DOMAINS",
    "FLAT_SHAPES",
    "SHAPES",
    "Camera",
    "Clip",
    "Expression",
    "FlatScenes",
    "Lidar",
    "Light",
    "PointCloud",
    "Recipe",
    "Scene",
    "Statement",
    "Surroundings",
    "Thing",
    "Views",
    "animate",
    "corners",
    "execute",
    "flat_scenes",
    "make_scene",
    "make_scenes",
    "mask_boxes",
    "orbit",
    "refer",
    "render",
    "rig",
    "scan",
    "state",
    "write_coco",
    "write_nerf",
    "write_nuscenes",
]
