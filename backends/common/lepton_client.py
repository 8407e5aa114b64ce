"""The client of Lepton's API: the SDK's own, with Airlift's timeouts and retries, and its errors in plain English."""

import sys
from collections.abc import Callable
from typing import Any

import screen
from runs import Run
from transport import Refusal


class Errors:
    """Standard error: the SDK prints there what it does not understand of an answer, which may repeat secrets."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.stream.write(screen.hide(text)[:10_000])
        return len(text)


def connect(ca_bundle: str | None) -> Any:
    """The SDK's client. Raises Refusal (exit code 4) if there are no credentials."""
    from backends.common import http
    with screen.step("import leptonai"):
        from leptonai.api.v2.client import APIClient
        from leptonai.api.v2.utils import WorkspaceConfigurationError
    try:
        client = APIClient()
    except (WorkspaceConfigurationError, TypeError):  # a TypeError if there is no token
        raise Refusal("there are no Lepton credentials here",
                      "export LEPTON_WORKSPACE_ID and LEPTON_WORKSPACE_TOKEN, or run `lep login`", 4) from None
    screen.conceal(client.auth_token)
    if not isinstance(sys.stderr, Errors):
        sys.stderr = Errors(sys.stderr)
    http.harden(client._session, ca_bundle)
    return client


def reconnect(run: Run) -> Any:
    client = connect(run.record.get("ca_bundle"))
    if client.url != run.record["url"]:
        raise Refusal("run %s is in the workspace at %s, and the credentials here are for %s"
                      % (run.id, run.record["url"], client.url), "use the credentials of that workspace", 4)
    return client


def ask_lepton(doing: str, client: Any, call: Callable[[], Any], sent: str = "", secrets: tuple[str, ...] = ()) -> Any:
    """The call's result. Raises Refusal for an error of the SDK or the network. `sent` and `secrets` as in http.py."""
    import requests
    from leptonai.api.v1.api_resource import ClientError, ServerError

    from backends.common import http
    try:
        return call()
    except (ClientError, ServerError) as error:
        raise http.refused("Lepton", error.response, doing, (client.auth_token or "", *secrets)) from None
    except (requests.RequestException, RuntimeError) as error:  # a RuntimeError for an answer that is not the API's
        raise http.unreachable("Lepton", client.url, error, sent) from None


def read(doing: str, client: Any, path: str, kind: type = dict, **query: str) -> Any:
    """The JSON of a GET as it is, of that `kind`: the SDK's models make a state that they do not know another one.
    Raises Refusal."""
    found = ask_lepton(doing, client, lambda: checked(client._get(path, params=query)).json())
    if not isinstance(found, kind):
        raise Refusal("Lepton at %s did not answer with a JSON %s to: %s" % (
            client.url, "object" if kind is dict else "list", doing), "check the workspace's address", 5)
    return found


def checked(response: Any) -> Any:
    """The response. Raises the SDK's error for one of 400 or more."""
    from leptonai.api.v1.api_resource import ClientError, ServerError
    if response.status_code >= 400:
        raise (ClientError if response.status_code < 500 else ServerError)(response)
    return response


def valid(what: str, make: Callable[[], Any]) -> Any:
    """The SDK's object that `make` returns. Raises Refusal for a field that the API does not allow."""
    from pydantic import ValidationError
    try:
        return make()
    except ValidationError as error:
        first = error.errors()[0]
        raise Refusal("the %s does not fit Lepton's API: %s: %s" % (
            what, ".".join(map(str, first["loc"])), first["msg"]), "correct it in the profile") from None


def require_known(what: str, given: dict[str, Any], made: Any) -> None:
    """Raises Refusal for fields that the SDK's object `made` of them has dropped silently."""
    lost = _dropped(given, made.model_dump(by_alias=True))
    if lost:
        fields = ", ".join(type(made).model_fields)
        raise Refusal("a %s has no field %s" % (what, ", ".join(lost)),
                      "remove it from custom_spec, security or mounts; the fields are " + fields)


def _dropped(given: Any, kept: Any, where: str = "") -> list[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        return [name for key, value in given.items() for name in
                ([where + key] if key not in kept else _dropped(value, kept[key], where + key + "."))]
    if isinstance(given, list) and isinstance(kept, list):
        return [name for pair in zip(given, kept, strict=True) for name in _dropped(*pair, where)]
    return []


def node_group(client: Any, name: str) -> str:
    """The id of a node group, by its name. Raises Refusal (exit code 4) that names the existing ones."""
    groups = ask_lepton("list the node groups", client, client.nodegroup.list_all)
    for group in groups:
        if name in (group.metadata.name, group.metadata.id_):
            return str(group.metadata.id_)
    known = ", ".join(sorted(str(group.metadata.name) for group in groups)) or "none"
    raise Refusal("Lepton has no node group %r" % name,
                  "this workspace has %s; set node_group in the profile" % known, 4)
