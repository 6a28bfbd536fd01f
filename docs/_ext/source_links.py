"""Links from pages to files of the repository that are no pages.

Where pyproject.toml names the public place of the source (``[project.urls] Source``), they lead there. Without one, the
site brings the file along, and the link opens that copy.
"""

from __future__ import annotations

import pathlib
import tomllib

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


class PublicSource(SphinxTransform):
    """Turns MyST's downloads of source files into links to the public repository, if there is one."""

    default_priority = 500

    def apply(self, **kwargs: object) -> None:
        """Replaces the downloads of one page."""
        root = pathlib.Path(self.app.srcdir)
        about = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if not (url := about.get("urls", {}).get("Source")):
            return
        here = (root / self.env.docname).parent
        for node in list(self.document.findall(addnodes.download_reference)):
            file = (here / node["reftarget"]).resolve().relative_to(root)
            node.replace_self(nodes.reference("", "", *node.children, refuri=f"{url}/blob/main/{file.as_posix()}"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Adds the transform."""
    app.add_transform(PublicSource)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
