"""Start a server of docker-compose.yml: `python servers.py prefect` or `python servers.py mlflow`.

Passwords come from the environment as they are. They are percent-encoded here for the databases'
addresses, and escaped for the settings file of MLflow's basic auth, so that every character is
allowed in them. Standard library only, because Prefect's image does not have this package.
"""

from __future__ import annotations

import configparser
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote


def database_address(driver: str, name: str, environment: Mapping[str, str]) -> str:
    """SQLAlchemy's address of a database on the Postgres that the environment describes.

    DATABASE_HOST (`postgres`), DATABASE_PORT (5432), DATABASE_USER (`mtl`); POSTGRES_PASSWORD must
    be set.
    """
    user = quote(environment.get("DATABASE_USER", "mtl"), safe="")
    password = quote(required("POSTGRES_PASSWORD", environment), safe="")
    host = environment.get("DATABASE_HOST", "postgres")
    port = environment.get("DATABASE_PORT", "5432")
    return f"{driver}://{user}:{password}@{host}:{port}/{name}"


def write_auth_settings(file: Path, environment: Mapping[str, str]) -> None:
    """MLflow's basic auth, with the administrator's password from MLFLOW_ADMIN_PASSWORD.

    The file is readable for its owner only.
    """
    password = required("MLFLOW_ADMIN_PASSWORD", environment)
    if password != password.strip() or "\n" in password or "\r" in password:
        sys.exit("MLFLOW_ADMIN_PASSWORD: it may not begin or end with a space, nor have two lines")
    settings = {
        "default_permission": "READ",
        "database_uri": database_address("postgresql+psycopg2", "mlflow_auth", environment),
        "admin_username": "admin",
        "admin_password": password,
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    # MLflow reads the file with interpolation, in which % begins a reference.
    parser = configparser.ConfigParser()
    parser["mlflow"] = {key: value.replace("%", "%%") for key, value in settings.items()}
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        parser.write(out)


def required(name: str, environment: Mapping[str, str]) -> str:
    if not environment.get(name):
        sys.exit(f"{name} must be set")
    return environment[name]


def prefect(environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The command of Prefect's server, and what it needs in its environment."""
    address = database_address("postgresql+asyncpg", "prefect", environment)
    command = ["prefect", "server", "start", "--host", environment.get("LISTEN", "0.0.0.0")]
    command += ["--port", environment.get("PORT", "4200")]
    return command, {"PREFECT_SERVER_DATABASE_CONNECTION_URL": address}


def mlflow(environment: Mapping[str, str], folder: Path) -> tuple[list[str], dict[str, str]]:
    """The command of MLflow's server with basic auth, and what it needs in its environment."""
    port = environment.get("PORT", "5000")
    settings = folder / "auth.ini"
    write_auth_settings(settings, environment)
    hosts = ",".join(f"{host}:{port}" for host in ("127.0.0.1", "localhost", "mlflow"))
    command = ["mlflow", "server", "--host", environment.get("LISTEN", "0.0.0.0"), "--port", port]
    command += ["--app-name", "basic-auth", "--allowed-hosts", hosts]
    command += ["--artifacts-destination", environment.get("ARTIFACTS", "s3://mlflow/artifacts")]
    # In the environment: other users could read the command's arguments.
    address = database_address("postgresql+psycopg2", "mlflow", environment)
    return command, {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_BACKEND_STORE_URI": address}


def main() -> None:
    if sys.argv[1:] == ["prefect"]:
        command, more = prefect(os.environ)
    elif sys.argv[1:] == ["mlflow"]:
        command, more = mlflow(os.environ, Path(tempfile.mkdtemp()))
    else:
        sys.exit(f"{sys.argv[1:]}: allowed: prefect, mlflow")
    os.execvpe(command[0], command, os.environ | more)


if __name__ == "__main__":
    main()
