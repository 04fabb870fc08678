//go:build tools

// Package tools pins Helm, which installs the chart into the lab's cluster.
package tools

import _ "helm.sh/helm/v3/cmd/helm"
