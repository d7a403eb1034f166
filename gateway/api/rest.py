"""Everything that is not relayed: the model list, health, metrics and the documentation, by FastAPI."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException

from adapters.catalogue import Model
from gateway.api.auth import may_use
from gateway.api.edge import Edge
from gateway.api.endpoints import ADMIN, Refused
from gateway.api.limits import LIMITS
from gateway.api.manage import MANAGE, Managed
from gateway.api.route import ROUTE
from gateway.api.routes import RELAYED
from gateway.api.usage import USAGE
from gateway.errors import Kind, Refusal, no_model, openai_body
from gateway.serving.bookkeeper import Bookkeeper
from gateway.serving.minded import Minders
from gateway.serving.pool import Endpoint
from gateway.settings import explain_details, section_of
from gateway.state.keys import KeyRecord
from gateway.store.protocol import Standing

TITLE = "Forebay"
SUMMARY = "An OpenAI-compatible gateway in front of inference engines"


# Read once, for both listeners: making a route of a function takes FastAPI a good deal longer than serving it. Which
# gateway is asked, a request knows from its app.
_HEALTH, _MODELS, _METRICS = APIRouter(tags=["health"]), APIRouter(tags=["models"]), APIRouter()


def _edge(request: Request) -> Edge:
    edge: Edge = request.app.state.edge
    return edge


@_HEALTH.get("/health/live", summary="The process is alive")
async def live() -> dict[str, str]:
    """Answer as long as the event loop turns; says nothing of engines."""
    return {"status": "ok"}


@_HEALTH.get("/health/ready", summary="Requests can be served")
async def ready(request: Request) -> JSONResponse:
    """Say whether a request could be served now, by whose word limits are kept, and how each engine is."""
    edge = _edge(request)
    standing = edge.limiter.standing
    if edge.closing:
        status = "shutting down"
    elif not edge.pool.ready:
        status = "no healthy engine"
    else:
        # Nobody who is limited would be let in here; another replica may reach the store.
        status = "limits cannot be checked" if standing is Standing.CLOSED else "ok"
    endpoints = [_describe_endpoint(endpoint) for endpoint in edge.pool.endpoints]
    told = {"status": status, "limits": standing, "endpoints": endpoints}
    return JSONResponse(told, 200 if status == "ok" else 503)


@_MODELS.get("/v1/models", summary="List the models this key may use")
async def list_models(request: Request) -> dict[str, Any]:
    """List the models of all engines, those alone that the caller's key may use."""
    edge = _edge(request)
    who = _identify(request, edge)
    models = [_describe(model) for model in edge.pool.catalogue.list() if may_use(who, model.name)]
    return {"object": "list", "data": models}


@_MODELS.get("/v1/models/{model:path}", summary="Describe one model")
async def show_model(model: str, request: Request) -> dict[str, Any]:
    """Describe a model by the name clients use; a name may hold slashes."""
    edge = _edge(request)
    who = _identify(request, edge)
    found = edge.pool.catalogue.resolve(model)
    if found is None:
        raise Refused(no_model(model))
    if not may_use(who, model):
        raise Refused(Refusal(Kind.NO_RIGHT, f"This key may not use the model {model!r}.", "model"))
    return _describe(found)


@_METRICS.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Return all series in Prometheus' text format."""
    edge = _edge(request)
    for endpoint in edge.pool.endpoints:
        edge.metrics.endpoint_state(endpoint.name, endpoint.healthy, endpoint.in_flight)
        edge.metrics.endpoint_cordoned(endpoint.name, endpoint.cordoned)
    for endpoint, state in request.app.state.minders.states.items():
        edge.metrics.engine_restarted(endpoint.name, state.restarts)
    books = request.app.state.books
    if books is not None:
        books.measure()
    edge.metrics.limits_standing(edge.limiter.standing, tuple(Standing))
    text = await asyncio.get_running_loop().run_in_executor(None, edge.metrics.render)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def public_app(edge: Edge, version: str) -> FastAPI:
    """Return what clients reach besides the relayed paths."""
    app = FastAPI(
        title=TITLE,
        summary=SUMMARY,
        version=version,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        routes=[*_HEALTH.routes, *_MODELS.routes],
    )
    app.state.edge = edge
    _handle_errors(app, edge)
    return app


def admin_app(
    edge: Edge, minders: Minders, managed: Managed, books: Bookkeeper | None, public: FastAPI, version: str
) -> FastAPI:
    """Return what only operators reach: metrics, health, the documentation, and with an admin key the rest.

    ``books`` None: no ledger is kept.
    """
    routes = [
        *_HEALTH.routes,
        *_METRICS.routes,
        *ADMIN.routes,
        *MANAGE.routes,
        *LIMITS.routes,
        *ROUTE.routes,
        *USAGE.routes,
    ]
    app = FastAPI(title=f"{TITLE} (operators)", version=version, redoc_url=None, routes=routes)
    app.state.edge = edge
    app.state.minders = minders
    app.state.managed = managed
    app.state.books = books
    _handle_errors(app, edge)
    app.openapi = cache(lambda: schema(public, app))  # type: ignore[method-assign]
    return app


def schema(public: FastAPI, admin: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI schema of all paths, the relayed ones from their table."""
    # Health is on both listeners, and stands here once.
    shown = {getattr(route, "path", "") for route in public.routes}
    routes = [*public.routes, *(route for route in admin.routes if getattr(route, "path", "") not in shown)]
    document = get_openapi(title=TITLE, version=public.version, summary=SUMMARY, routes=routes)
    answers = {
        "200": {"description": "The engine's answer, or its event stream where the body says 'stream': true"},
        "4XX": {"description": "The request is refused; the error says why and what to do"},
        "5XX": {"description": "The engine or the gateway failed; SDKs try again by themselves"},
    }
    body = {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
    for path, route in RELAYED.items():
        operation = {"summary": route.summary, "tags": ["relayed"], "requestBody": body, "responses": answers}
        document["paths"].setdefault(path, {})["post"] = operation
    return document


def _describe(model: Model) -> dict[str, Any]:
    described: dict[str, Any] = {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "forebay",
    }
    if model.max_model_len is not None:
        described["max_model_len"] = model.max_model_len
    return described


def _identify(request: Request, edge: Edge) -> KeyRecord:
    who = edge.authenticator.identify(dict(request.headers.raw))
    if isinstance(who, Refusal):
        raise Refused(who)
    return who


def _problems(request: Request, error: RequestValidationError) -> Iterator[str]:
    """What is wrong with a request, in the words the configuration's mistakes are told in, and as briefly."""
    dependant = request.scope["route"].dependant
    read = {"body": dependant.body_params, "query": dependant.query_params}
    details: Sequence[ErrorDetails] = error.errors()
    for detail in details:
        where, *location = detail["loc"]
        models = [section_of(parameter.field_info.annotation) for parameter in read.get(str(where), ())]
        root = next((model for model in models if model is not None), None)
        if root is None:
            yield f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
        elif not location:
            yield "The body is missing." if detail["type"] == "missing" else "The body should be a JSON object."
        else:
            inside: ErrorDetails = {**detail, "loc": tuple(location)}
            yield from explain_details([inside], root)


def _describe_endpoint(endpoint: Endpoint) -> dict[str, Any]:
    return {"name": endpoint.name, "healthy": endpoint.healthy, "models": sorted(endpoint.models)}


def _handle_errors(app: FastAPI, edge: Edge) -> None:
    def answer(refusal: Refusal, headers: dict[str, str] | None = None) -> Response:
        content = openai_body(refusal, "")
        return Response(content, refusal.kind.value.status, headers, "application/json")

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return answer(error.refusal)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path, method = request.url.path, request.method
        if error.status_code == 405 or (error.status_code == 404 and path in RELAYED):
            allowed = "POST" if path in RELAYED else (error.headers or {}).get("allow", "GET")
            told = f"{method} is not offered on {path}. Use {allowed}."
            return answer(Refusal(Kind.NO_METHOD, told), {"allow": allowed})
        if error.status_code == 404:
            return answer(Refusal(Kind.NO_PATH, f"There is nothing at {method} {path}. The paths are OpenAI's: /v1/…"))
        return answer(Refusal(Kind.INVALID, str(error.detail)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(Refusal(Kind.INVALID, "; ".join(_problems(request, error))))

    @app.exception_handler(Exception)
    async def internal(request: Request, error: Exception) -> Response:
        edge.log.failed("internal_error", error, path=request.url.path)
        return answer(Refusal(Kind.INTERNAL, "The gateway failed on this request. Its log says why."))


class WithRequestId:
    """ASGI: gives every answer of ``app`` an ``x-request-id``."""

    def __init__(self, app: Any, edge: Edge) -> None:
        self._app = app
        self._edge = edge

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = self._edge.new_id(self._edge.log.wall())
        request_id = told.encode("ascii")
        # What a route knows as ``request.state.request_id``; the server's own state is shared by all requests.
        scope["state"] = {**scope.get("state", {}), "request_id": told}

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
                if self._edge.closing:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        await self._app(scope, receive, send_with_id)


class SmallBodies:
    """ASGI: hands ``app`` no more of a body than any command needs. A body is read before it is asked whose it is, and
    parsed where requests are served: a large one would be everybody's wait and memory."""

    def __init__(self, app: Any, most: int = 64 * 1024) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request."""
        left = self._most

        async def receive_little() -> Any:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            # As if its sender had left: what is read of it is not looked at.
            return message if left >= 0 else {"type": "http.disconnect"}

        await self._app(scope, receive_little, send)
