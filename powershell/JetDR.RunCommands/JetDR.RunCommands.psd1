@{
    RootModule        = 'JetDR.RunCommands.psm1'
    ModuleVersion     = '0.1.0'
    GUID              = '5d0c6a52-8c1e-4a39-9f0e-1d7a2b9c4e63'
    Author            = 'jetdr'
    CompanyName       = 'JetDR'
    Copyright         = 'Apache-2.0'
    Description       = 'The run commands of jetdr: a thin layer over its REST executions and its command.'
    PowerShellVersion = '7.2'
    FunctionsToExport = @(
        'Disable-JetDRForCluster'
        'Enable-JetDRForCluster'
        'Install-JetDRWithDHCP'
        'Install-JetDRWithStaticIP'
        'Invoke-PreflightJetDRInstall'
        'Invoke-PreflightJetDRSystemCheck'
        'Invoke-PreflightJetDRUninstall'
        'Uninstall-JetDR'
    )
    CmdletsToExport   = @()
    VariablesToExport = @()
    AliasesToExport   = @()
}
