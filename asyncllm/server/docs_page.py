"""GET /openapi.json, and GET /docs: Swagger UI over it, from an installed package, so that no other host is asked.

GET / leads there.
"""

import importlib.util
from pathlib import Path

from aiohttp import web

from asyncllm.errors import NotFound, show

DOCUMENT = web.AppKey("document", bytes)  # the specification as JSON, made once per application

# Swagger UI draws with inline styles and data: images; scripts come from here and are never inline.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
CACHED = {"Cache-Control": "public, max-age=86400"}

# Addresses are relative: the server may stand behind a prefix.
PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>asyncllm API</title>
<link rel="icon" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="api"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
START = """\
SwaggerUIBundle({url: "openapi.json", dom_id: "#api", deepLinking: true, displayRequestDuration: true});
"""
# One that is not listed is not served, whatever else the package holds.
FILES = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-32x32.png": "image/png",
}


async def home(request: web.Request) -> web.Response:
    """Leads to the page of the documentation."""
    return web.Response(status=302, headers={"Location": "docs", "Cache-Control": "no-cache"})


async def openapi_json(request: web.Request) -> web.Response:
    """This specification, OpenAPI 3.1."""
    return web.Response(
        body=request.app[DOCUMENT], content_type="application/json", headers={"Cache-Control": "no-cache"}
    )


async def docs(request: web.Request) -> web.Response:
    """An interactive page for this specification."""
    headers = HEADERS | {"Cache-Control": "no-cache"}
    return web.Response(text=PAGE, content_type="text/html", charset="utf-8", headers=headers)


async def docs_file(request: web.Request) -> web.StreamResponse:
    """A file of that page."""
    name = request.match_info["file"]
    if name == "start.js":
        return web.Response(text=START, content_type="text/javascript", charset="utf-8", headers=HEADERS | CACHED)
    folder = assets()
    if name not in FILES or folder is None:
        raise NotFound(f"The documentation has no file {show(name)}.")
    return web.FileResponse(folder / name, headers=HEADERS | CACHED | {"Content-Type": FILES[name]})


def assets() -> Path | None:
    """Where swagger-ui-py keeps Swagger UI; None where it is not installed. The package itself is not imported."""
    package = importlib.util.find_spec("swagger_ui")
    return Path(package.origin).parent / "static" if package is not None and package.origin else None
