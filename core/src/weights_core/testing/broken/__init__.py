# SPDX-License-Identifier: Apache-2.0
"""Plugins that honour every clause of their contract but one: they prove that the kit sees it.

`sources.BROKEN`, `owners.BROKEN`, `wrappers.BROKEN` and `publishers.BROKEN` map a clause to the
plugin that breaks it; each module's `SOUND` honours all. Nothing here imports torch before it must.
"""
