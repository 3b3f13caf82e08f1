#!/bin/sh
# MLflow's server with basic auth: the administrator's password comes from the environment, so that
# MLflow's own default never exists.
set -eu
umask 077
cat > /tmp/auth.ini <<END
[mlflow]
default_permission = READ
database_uri = ${DATABASE}/mlflow_auth
admin_username = admin
admin_password = ${MLFLOW_ADMIN_PASSWORD}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
END
export MLFLOW_AUTH_CONFIG_PATH=/tmp/auth.ini
exec mlflow server --host 0.0.0.0 --port 5000 --app-name basic-auth \
  --allowed-hosts "127.0.0.1:5000,localhost:5000,mlflow:5000" \
  --backend-store-uri "${DATABASE}/mlflow" --artifacts-destination s3://mlflow/artifacts
