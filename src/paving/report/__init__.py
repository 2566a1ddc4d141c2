"""What a run did, shown: one self-contained HTML page, a terminal table, markdown, and the main picture."""

from paving.report.comparison import comparison_table, nothing_passes
from paving.report.diagnostics import diagnosis_lines
from paving.report.examples import Example
from paving.report.page import write_picture, write_report
from paving.report.tables import three_way_markdown, three_way_table

__all__ = [
    "Example",
    "comparison_table",
    "diagnosis_lines",
    "nothing_passes",
    "policy_sentences",
    "policy_table",
    "three_way_markdown",
    "three_way_table",
    "write_circuit_report",
    "write_picture",
    "write_report",
]


def __getattr__(name: str):
    # Their metrics stand beside what measures them, which imports torch; a table of another run should not wait for it.
    if name in {"policy_sentences", "write_circuit_report"}:
        from paving.report import circuit_page

        return getattr(circuit_page, name)
    if name == "policy_table":
        from paving.report.circuit_tables import policy_table

        return policy_table
    raise AttributeError(f"module 'paving.report' has no attribute {name!r}")
