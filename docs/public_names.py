"""For the reference pages: what a package of Lumen imports as `x as x` is public there."""

import griffe


class PublicNames(griffe.Extension):
    """Marks the names that each `__init__.py` re-exports, so that mkdocstrings lists them."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        """Visit the package just loaded, and the packages inside."""
        packages = [pkg]
        while packages:
            package = packages.pop()
            for name, member in package.members.items():
                if member.is_alias:
                    member.public = not name.startswith("_")
                elif member.is_module and member.is_init_module:
                    packages.append(member)
