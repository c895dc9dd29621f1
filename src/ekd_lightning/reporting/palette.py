"""Colours of methods, for figures on white and for the page on light and dark ground."""

from __future__ import annotations

LIGHT = ("#0864BC", "#BA5309", "#00805C", "#C3598F", "#C28200", "#3F97CC", "#6D4400", "#52444E")
DARK = ("#63B8F2", "#E6903F", "#32BB97", "#E28CCB", "#E8B23A", "#A5D8F5", "#B48466", "#B6E6CE")
"""The hues of Okabe and Ito (2008), moved until any two differ by 0.06 in OKLab as seen with all cones, without
red ones and without green ones (Machado et al. 2009), with a contrast of at least 3 to 1 with their ground (WCAG 2.2,
1.4.11). Marks and dashes differ, too, so that no figure hangs on colour alone."""
SHADES = ("#f4f1de", "#a9d5c3", "#4ea5c4")
"""Of heat maps, from low to high: dark text can be read on each of them."""
