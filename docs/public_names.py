"""For the reference pages: which names are public, and doctests shown as code."""

import griffe


class PublicNames(griffe.Extension):
    """Marks the names in each package's `__all__`, so that mkdocstrings lists them."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Visit the package just loaded, and the packages inside."""
        packages = [pkg]
        while packages:
            package = packages.pop()
            for name, member in package.members.items():
                if member.is_alias:
                    member.public = name in (package.exports or ())
                elif member.is_module and member.is_init_module:
                    packages.append(member)


class FencedDoctests(griffe.Extension):
    """Puts each doctest in a code fence: as plain text its brackets would read as links."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite the object's docstring before it is parsed."""
        if obj.docstring:
            obj.docstring.value = fence(obj.docstring.value)


def fence(text: str) -> str:
    """`text` with a fence round each run of lines from `>>>` to the next empty line.

    >>> print(fence("Doubles.\\n\\n>>> 2 * 2\\n4"))
    Doubles.
    <BLANKLINE>
    ```pycon
    >>> 2 * 2
    4
    ```
    """
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if not inside and line.lstrip().startswith(">>> "):
            lines.append("```pycon")
            inside = True
        elif inside and not line.strip():
            lines.append("```")
            inside = False
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)
