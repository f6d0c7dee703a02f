# The run commands of jetdr: a thin layer. What the server carries out goes over REST; installing and
# uninstalling is done by the command `jetdr` on this machine.
#
# Invariant: a cmdlet ends without an error only if all of it was done; a password is never an argument of a
# program, and no certificate is taken on trust: the server's authority (its ca.pem) must be one that this
# machine trusts.

Set-StrictMode -Version Latest

# Sends one request; the answer.
function Invoke-JetDRRest {
    param(
        [Parameter(Mandatory)] [string] $Server,
        [Parameter(Mandatory)] [string] $Method,
        [Parameter(Mandatory)] [string] $Path,
        [hashtable] $Body,
        [string] $Token
    )
    $request = @{
        Uri         = "$Server/api/v1$Path"
        Method      = $Method
        ErrorAction = 'Stop'
    }
    if ($Token) {
        $request.Headers = @{ Authorization = "Bearer $Token" }
    }
    if ($Body) {
        $request.Body = ConvertTo-Json -InputObject $Body -Depth 5
        $request.ContentType = 'application/json'
    }
    Invoke-RestMethod @request
}

# Has the server carry something out and writes its output as it grows.
function Invoke-JetDRExecution {
    param(
        [Parameter(Mandatory)] [string] $Kind,
        [Parameter(Mandatory)] [hashtable] $Fields,
        [Parameter(Mandatory)] [hashtable] $Common
    )
    $server = "https://$($Common.MSIp):$($Common.Port)"
    $account = $Common.Credential.GetNetworkCredential()
    $login = @{ name = $account.UserName; password = $account.Password }
    $token = (Invoke-JetDRRest -Server $server -Method 'POST' -Path '/login' -Body $login).token
    $name = $Common.ExecutionName
    if (-not $name) {
        $name = ($Kind -replace '-', '') + [DateTimeOffset]::UtcNow.ToUnixTimeMilliseconds()
    }
    # What was not given is not sent.
    $given = @{}
    foreach ($field in $Fields.Keys) {
        if ($null -ne $Fields[$field] -and '' -ne $Fields[$field]) {
            $given[$field] = $Fields[$field]
        }
    }
    $execution = @{ name = $name; kind = $Kind; parameters = $given; timeout_s = $Common.TimeoutSeconds; retention_days = $Common.RetentionDays }
    $id = (Invoke-JetDRRest -Server $server -Method 'POST' -Path '/executions' -Body $execution -Token $token).id
    $after = 0
    do {
        # Before the output: what has ended has said all.
        $state = Invoke-JetDRRest -Server $server -Method 'GET' -Path "/executions/$id" -Token $token
        do {
            $part = Invoke-JetDRRest -Server $server -Method 'GET' -Path "/executions/$id/output?limit=200&after=$after" -Token $token
            foreach ($line in $part.items) {
                Write-Output $line.text
                $after = $line.seq
            }
        } while ($null -ne $part.next)
        $ended = ($null -ne $state.ended_at_ms) -or ($state.state -eq 'blocked')
        if (-not $ended) {
            Start-Sleep -Milliseconds 500
        }
    } while (-not $ended)
    if ($state.state -ne 'succeeded') {
        throw "execution $name is $($state.state): $($state.error)"
    }
}

# Runs `jetdr` with passwords in files that nobody else can read, and that go again.
function Invoke-JetDRCommand {
    param(
        [Parameter(Mandatory)] [string[]] $Arguments,
        [Parameter(Mandatory)] [hashtable] $Passwords
    )
    $files = @()
    try {
        foreach ($flag in $Passwords.Keys) {
            if ($null -eq $Passwords[$flag]) {
                continue
            }
            $file = New-TemporaryFile
            $files += $file
            if (-not $IsWindows) {
                chmod 600 $file.FullName
            }
            $password = $Passwords[$flag].GetNetworkCredential().Password
            Set-Content -Path $file.FullName -Value $password
            $Arguments += @($flag, $file.FullName)
        }
        & jetdr @Arguments
        if ($LASTEXITCODE -eq 2) {
            Write-Warning 'done, but some hosts failed: they are named above'
        } elseif ($LASTEXITCODE -ne 0) {
            throw "jetdr $($Arguments[0]) failed with exit code $LASTEXITCODE"
        }
    } finally {
        foreach ($file in $files) {
            Remove-Item -Path $file.FullName -Force
        }
    }
}

# Looks at vCenter, its version and clock, and at names in DNS.
function Invoke-PreflightJetDRSystemCheck {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory)] [string] $MSIp,
        [Parameter(Mandatory)] [pscredential] $Credential,
        [string] $Vcenter,
        [string] $ExecutionName,
        [int] $RetentionDays = 60,
        [int] $TimeoutSeconds = 1800,
        [int] $Port = 8443
    )
    $common = @{ MSIp = $MSIp; Port = $Port; Credential = $Credential; ExecutionName = $ExecutionName; RetentionDays = $RetentionDays; TimeoutSeconds = $TimeoutSeconds }
    Invoke-JetDRExecution -Kind 'preflight-system' -Common $common -Fields @{ vcenter = $Vcenter }
}

# Looks whether a cluster can be protected. Before there is a server, Install-JetDR... looks by itself.
function Invoke-PreflightJetDRInstall {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory)] [string] $MSIp,
        [Parameter(Mandatory)] [pscredential] $Credential,
        [Parameter(Mandatory)] [string] $Network,
        [Parameter(Mandatory)] [string] $Datastore,
        [Parameter(Mandatory)] [string] $ProtectedCluster,
        [Parameter(Mandatory)] [string] $Cluster,
        [Parameter(Mandatory)] [string] $VMName,
        [string] $Vcenter,
        [string] $ExecutionName,
        [int] $RetentionDays = 60,
        [int] $TimeoutSeconds = 1800,
        [int] $Port = 8443
    )
    $common = @{ MSIp = $MSIp; Port = $Port; Credential = $Credential; ExecutionName = $ExecutionName; RetentionDays = $RetentionDays; TimeoutSeconds = $TimeoutSeconds }
    Invoke-JetDRExecution -Kind 'preflight-install' -Common $common -Fields @{ vcenter = $Vcenter; network = $Network; datastore = $Datastore; protected_cluster = $ProtectedCluster; cluster = $Cluster; vm_name = $VMName }
}

# Adds one more cluster.
function Enable-JetDRForCluster {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory)] [string] $ProtectedCluster,
        [Parameter(Mandatory)] [pscredential] $Credential,
        [Parameter(Mandatory)] [string] $MSIp,
        [string] $Vcenter,
        [string] $ExecutionName,
        [int] $RetentionDays = 60,
        [int] $TimeoutSeconds = 1800,
        [int] $Port = 8443
    )
    $common = @{ MSIp = $MSIp; Port = $Port; Credential = $Credential; ExecutionName = $ExecutionName; RetentionDays = $RetentionDays; TimeoutSeconds = $TimeoutSeconds }
    Invoke-JetDRExecution -Kind 'enable-cluster' -Common $common -Fields @{ vcenter = $Vcenter; protected_cluster = $ProtectedCluster }
}

# Removes the component from one cluster; the server stays.
function Disable-JetDRForCluster {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory)] [string] $ProtectedCluster,
        [Parameter(Mandatory)] [pscredential] $Credential,
        [Parameter(Mandatory)] [string] $MSIp,
        [switch] $Detach,
        [string] $Vcenter,
        [string] $ExecutionName,
        [int] $RetentionDays = 60,
        [int] $TimeoutSeconds = 1800,
        [int] $Port = 8443
    )
    $common = @{ MSIp = $MSIp; Port = $Port; Credential = $Credential; ExecutionName = $ExecutionName; RetentionDays = $RetentionDays; TimeoutSeconds = $TimeoutSeconds }
    Invoke-JetDRExecution -Kind 'disable-cluster' -Common $common -Fields @{ vcenter = $Vcenter; protected_cluster = $ProtectedCluster; detach = [bool]$Detach }
}

# Looks whether a cluster can be left.
function Invoke-PreflightJetDRUninstall {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory)] [string] $MSIp,
        [Parameter(Mandatory)] [pscredential] $Credential,
        [Parameter(Mandatory)] [string] $ProtectedCluster,
        [string] $Vcenter,
        [string] $ExecutionName,
        [int] $RetentionDays = 60,
        [int] $TimeoutSeconds = 1800,
        [int] $Port = 8443
    )
    $common = @{ MSIp = $MSIp; Port = $Port; Credential = $Credential; ExecutionName = $ExecutionName; RetentionDays = $RetentionDays; TimeoutSeconds = $TimeoutSeconds }
    Invoke-JetDRExecution -Kind 'preflight-uninstall' -Common $common -Fields @{ vcenter = $Vcenter; protected_cluster = $ProtectedCluster }
}

# Installs the server on this machine with a static address, and enables the cluster.
function Install-JetDRWithStaticIP {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory)] [string] $ProtectedCluster,
        [Parameter(Mandatory)] [string] $Datastore,
        [Parameter(Mandatory)] [string] $VMName,
        [Parameter(Mandatory)] [string] $Cluster,
        [Parameter(Mandatory)] [int] $Netmask,
        [Parameter(Mandatory)] [string] $MSIp,
        [Parameter(Mandatory)] [string] $Dns,
        [Parameter(Mandatory)] [string] $Gateway,
        [Parameter(Mandatory)] [pscredential] $Credential,
        [Parameter(Mandatory)] [string] $HostName,
        [Parameter(Mandatory)] [string] $Network,
        [Parameter(Mandatory)] [string] $Vcenter,
        [Parameter(Mandatory)] [pscredential] $VcenterCredential,
        [Parameter(Mandatory)] [pscredential] $ServiceCredential,
        [Parameter(Mandatory)] [string] $Package,
        [string[]] $More = @()
    )
    $arguments = @(
        'install', '--static', '--ms-ip', $MSIp, '--netmask', $Netmask, '--gateway', $Gateway, '--dns', $Dns
        '--protected-cluster', $ProtectedCluster, '--cluster', $Cluster, '--datastore', $Datastore
        '--network', $Network, '--vm-name', $VMName, '--host-name', $HostName
        '--vcenter', $Vcenter, '--vcenter-user', $VcenterCredential.UserName
        '--service-user', $ServiceCredential.UserName, '--admin', $Credential.UserName, '--package', $Package
    )
    Invoke-JetDRCommand -Arguments ($arguments + $More) -Passwords @{
        '--password-file'         = $Credential
        '--vcenter-password-file' = $VcenterCredential
        '--service-password-file' = $ServiceCredential
    }
}

# Installs the server on this machine at the address to which its name resolves, and enables the cluster.
function Install-JetDRWithDHCP {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory)] [string] $ProtectedCluster,
        [Parameter(Mandatory)] [string] $Datastore,
        [Parameter(Mandatory)] [string] $VMName,
        [Parameter(Mandatory)] [string] $Cluster,
        [Parameter(Mandatory)] [pscredential] $Credential,
        [Parameter(Mandatory)] [string] $HostName,
        [Parameter(Mandatory)] [string] $Network,
        [Parameter(Mandatory)] [string] $Vcenter,
        [Parameter(Mandatory)] [pscredential] $VcenterCredential,
        [Parameter(Mandatory)] [pscredential] $ServiceCredential,
        [Parameter(Mandatory)] [string] $Package,
        [string[]] $More = @()
    )
    $arguments = @(
        'install', '--dhcp'
        '--protected-cluster', $ProtectedCluster, '--cluster', $Cluster, '--datastore', $Datastore
        '--network', $Network, '--vm-name', $VMName, '--host-name', $HostName
        '--vcenter', $Vcenter, '--vcenter-user', $VcenterCredential.UserName
        '--service-user', $ServiceCredential.UserName, '--admin', $Credential.UserName, '--package', $Package
    )
    Invoke-JetDRCommand -Arguments ($arguments + $More) -Passwords @{
        '--password-file'         = $Credential
        '--vcenter-password-file' = $VcenterCredential
        '--service-password-file' = $ServiceCredential
    }
}

# Removes the server of this machine from all clusters and from vCenter.
function Uninstall-JetDR {
    [CmdletBinding()]
    param(
        [Parameter(Mandatory)] [pscredential] $Credential,
        [Parameter(Mandatory)] [pscredential] $VcenterCredential,
        [string[]] $More = @()
    )
    Invoke-JetDRCommand -Arguments (@('uninstall') + $More) -Passwords @{
        '--password-file'         = $Credential
        '--vcenter-password-file' = $VcenterCredential
    }
}

Export-ModuleMember -Function @(
    'Disable-JetDRForCluster'
    'Enable-JetDRForCluster'
    'Install-JetDRWithDHCP'
    'Install-JetDRWithStaticIP'
    'Invoke-PreflightJetDRInstall'
    'Invoke-PreflightJetDRSystemCheck'
    'Invoke-PreflightJetDRUninstall'
    'Uninstall-JetDR'
)
