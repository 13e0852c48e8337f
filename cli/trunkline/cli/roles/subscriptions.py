"""`trunkline subscriptions`."""

from typing import Annotated

import typer

from trunkline.cli.options import with_settings
from trunkline.cli.roles.run import run_role
from trunkline.subscriptions.service import SubscriptionService
from trunkline.subscriptions.settings import SubscriptionSettings

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="markdown")


@app.command(epilog="Example: **trunkline subscriptions shop.sockets:app --nats-url nats://nats:4222**")
@with_settings(SubscriptionSettings)
def subscriptions(
    settings: SubscriptionSettings,
    app: Annotated[
        str | None, typer.Argument(help="The app whose functions it runs, named as for workers: app.py, shop.sockets:app")
    ] = None,
) -> None:
    """Run the subscription service: it owns the topics, gives each publication its offset and sends it to the
    edges.

    Any number of instances share the topics. When one goes, the others take over its share. Give all of them
    the app that the workers have: they run its subscription functions. Without an app they do all but that.
    """
    run_role(lambda: SubscriptionService(settings), settings)
