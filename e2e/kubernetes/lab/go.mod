module warren.dev/e2e/kubernetes/lab

go 1.24
