# SPDX-License-Identifier: Apache-2.0
#
# Two images, both static, for linux/amd64 and linux/arm64: `--target server`
# is the cluster half, `--target agent` (the default) the node half with the
# debug CLI. The build stage runs on the builder's own architecture and
# cross-compiles.
FROM --platform=$BUILDPLATFORM golang:1.26 AS build

WORKDIR /src
# Dependencies change less often than the sources: a layer of their own.
COPY go.mod go.sum ./
RUN go mod download

COPY . .
ARG TARGETOS=linux
ARG TARGETARCH
ARG VERSION=dev
RUN set -eu; \
    for c in latchkey-agent latchkey latchkey-server; do \
        CGO_ENABLED=0 GOOS="$TARGETOS" GOARCH="$TARGETARCH" \
            go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$VERSION" \
            -o "/out/$c" "./cmd/$c"; \
    done

# Nothing else is in the images: no shell, no package manager, no libc.
FROM scratch AS server

ARG VERSION=dev
LABEL org.opencontainers.image.title="Latchkey server" \
      org.opencontainers.image.description="EKS-compatible pod identity associations and EKS Auth for any cluster" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION"

COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /src/LICENSE /src/NOTICE /licenses/
COPY --from=build /out/latchkey-server /

# Any user but root; the state directory must be that user's.
USER 65532:65532
ENTRYPOINT ["/latchkey-server"]

# The agent's programs for the kernel are embedded in it.
FROM scratch AS agent

ARG VERSION=dev
LABEL org.opencontainers.image.title="Latchkey" \
      org.opencontainers.image.description="Gives every pod on a node the cloud credentials of its own role, and only to that pod" \
      org.opencontainers.image.licenses="Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)" \
      org.opencontainers.image.version="$VERSION"

COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /src/LICENSE /src/NOTICE /licenses/
COPY --from=build /src/LICENSES/ /licenses/
COPY --from=build /out/latchkey-agent /out/latchkey /

# Root: it loads programs into the kernel. docs/privileges.md lists the
# capabilities to give it; it needs no more than those.
ENTRYPOINT ["/latchkey-agent"]
