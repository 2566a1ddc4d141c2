"""What a run did, shown: one self-contained HTML page, a terminal table, markdown, and the main picture."""

from paving.report.diagnostics import diagnosis_lines
from paving.report.page import Example, write_picture, write_report
from paving.report.tables import three_way_markdown, three_way_table

__all__ = ["Example", "diagnosis_lines", "three_way_markdown", "three_way_table", "write_picture", "write_report"]
