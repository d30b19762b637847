/** Strings of src/views/machine*.ts. */
export const machineWords = {} as const
