"""Colours of methods, for figures on white and for the page on light and dark ground."""

from __future__ import annotations

LIGHT = ("#0072B2", "#C85200", "#00805C", "#B0568C", "#A06C00", "#2E86B5", "#6E4B1F", "#5F5F5F")
DARK = ("#56B4E9", "#F0894A", "#2EC29A", "#E396C4", "#E8B23A", "#A5D8F5", "#C9A27A", "#B9BDC2")
"""After Okabe and Ito (2008), who chose colours that all common kinds of colour vision tell apart. Made darker, or
lighter, until each has a contrast of at least 3 to 1 with its ground (WCAG 2.2, 1.4.11); marks and dashes differ,
too, so that no figure hangs on colour alone."""
SHADES = ("#f4f1de", "#a9d5c3", "#4ea5c4")
"""Of heat maps, from low to high: dark text can be read on each of them."""
