"""A page taken apart, to see what a browser would make of its source."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Parsed(HTMLParser):
    """Every tag of a page with its attributes, and the text outside style and script."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in {"style", "script"}:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def assert_nothing_is_fetched(source: str) -> None:
    for tag, attributes in Parsed(source).tags:
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"}:
                assert value.startswith(("#", "data:,")), (tag, name, value)
    assert "@import" not in source
    assert set(re.findall(r"url\(\s*['\"]?(.)", source)) <= {"#"}
    addresses = set(re.findall(r"https?://[^\"'\s<>)]*", source))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def assert_ids_resolve(source: str) -> int:
    """Every id stands once, and every reference has one. Returns how many ids there are."""
    ids = [attributes["id"] for _, attributes in Parsed(source).tags if "id" in attributes]
    references = set(re.findall(r"url\(#([^)]+)\)", source)) | set(re.findall(r'xlink:href="#([^"]+)"', source))
    assert len(ids) == len(set(ids)) and references <= set(ids)
    return len(ids)
