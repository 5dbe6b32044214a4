"""The edge: a daemon that serves a bundle and lets it adapt, its client, streams to try it on. No torch."""

from __future__ import annotations
