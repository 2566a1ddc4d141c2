"""What a run did, shown: one self-contained HTML page, a terminal table, markdown, and the main picture."""

from paving.report.page import Example, trajectory_sentence, write_picture, write_report
from paving.report.tables import three_way_markdown, three_way_table

__all__ = ["Example", "three_way_markdown", "three_way_table", "trajectory_sentence", "write_picture", "write_report"]
