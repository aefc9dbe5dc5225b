"""What one pruning run did: a record that prints as a table, plots, and survives JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from jbrprune.report.figures import extra, report_plot
from jbrprune.report.html import report_page
from jbrprune.report.records import LayerRow, Run, Size, StepRow, plain, record
from jbrprune.report.text import report_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["LayerRow", "Report", "Size", "StepRow"]


@dataclass(frozen=True)
class Report(Run):
    """Everything one pruning run has to say; its attributes are those of `Run`."""

    def __str__(self) -> str:
        """Plain text, at most 100 columns."""
        return report_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Pure JSON types: tuples become lists, NaN and Inf become None, anything foreign its string."""
        return plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Undo `to_dict`; keys that are not known are ignored.

        Raises:
            ArgumentError: A required key is missing (named), or a record is not a mapping.
        """
        return record(cls, data)

    def to_frame(self) -> DataFrame:
        """One row per layer: name, type, kind, before, after, kept.

        Raises:
            ImportError: pandas is not installed.
        """
        names = [item.name for item in fields(LayerRow)] + ["kept"]
        rows = [[getattr(layer, name) for name in names] for layer in self.layers]
        return extra("pandas").DataFrame(rows, columns=names)

    def to_html(self, path: str | os.PathLike[str] | None = None, *, predicted: DataFrame | None = None) -> str:
        """One self-contained page: cost, agreement, curves, widths of all layers, settings, provenance.

        Args:
            path: Write the page here as well.
            predicted: A prediction for the same model and images, as a table with the columns ``macs`` (share kept)
                and ``predicted_flips`` and, or, ``predicted_flips_repaired`` (share of images whose top-1 changes).

        Returns:
            The page.

        Raises:
            ArgumentError: The prediction is of something else, or lacks a column.
        """
        return report_page(self, path, predicted)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Kept width of every layer, and agreement against MACs over the steps.

        Args:
            path: Write the figure here as well; the suffix gives the format (``.png``, ``.svg``, ``.pdf``).

        Returns:
            The figure; no window is opened and no global state of matplotlib is touched.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return report_plot(self, path)
