"""Hydra takes plugins from the package `hydra_plugins` alone, of which this folder is a part (`lrsa.sweep`)."""

from lrsa.sweep import ray_launcher, sweeper


class GridSweeper(sweeper.GridSweeper):
    """`hydra/sweeper=grid`."""


class RayLauncher(ray_launcher.RayLauncher):
    """`hydra/launcher=ray_cluster`."""
